"""Section `serve`: addresses, access, replicas, and the limits of the HTTP service."""

from __future__ import annotations

import ipaddress
from typing import Self

from pydantic import Field, field_validator, model_validator

from htcl_ray.config.sections.base import Names, Settings


class ServeSettings(Settings):
    """HTTP service: addresses, access, replicas and limits."""

    host: str = "127.0.0.1"
    """Address on which the service listens. With an address that other machines can reach, such as 0.0.0.0, requests
    need an API key."""
    port: int = Field(8000, ge=0, le=65535)
    """Port of the service. 0: a free port, which is printed at the start."""
    allowed_hosts: Names = ()
    """Allowed names in the Host header of a request, in addition to localhost and `serve.host`. `*` allows any name,
    for a service behind a proxy that checks it. When other machines can reach `serve.host`, IP addresses (such as
    192.0.2.7) are allowed as well."""
    trusted_proxies: Names = ()
    """Addresses or networks (such as 10.0.0.0/8) of proxies whose X-Forwarded-For header is trusted; none by default.
    Rate limits of clients without a key then apply to the address in that header, and otherwise to the address of the
    connection."""
    metrics_host: str = "127.0.0.1"
    """Address of the Prometheus endpoint `/metrics`, which requires no key: use one that only trusted machines can
    reach."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Port of `/metrics`. Null: 9464, or a free port when that one is in use; 0: a free port. The port is printed at
    the start."""

    encoder_replicas: int = Field(1, ge=1)
    """Number of encoder replicas; the minimum when they are autoscaled."""
    max_encoder_replicas: int | None = Field(None, ge=1)
    """Maximum number of encoder replicas, autoscaled with the requests in progress. Null: no autoscaling."""
    encoder_cpus: float = Field(1.0, gt=0)
    """Number of CPUs reserved per encoder replica, which computes with max(1, this) threads."""
    encoder_gpus: float = Field(0.0, ge=0)
    """Share of a GPU reserved per encoder replica. 0: encoders run on the CPU."""
    ingress_replicas: int = Field(1, ge=1)
    """Number of replicas that hold the index and handle HTTP requests. Replicas on one machine share the memory of the
    index."""
    max_batch_size: int = Field(16, ge=1)
    """Maximum number of audio clips or texts per batch of an encoder."""
    batch_wait_seconds: float = Field(0.01, ge=0)
    """Maximum time in seconds that the first request of a batch waits for others."""
    cache_entries: int = Field(10_000, ge=0)
    """Number of query vectors that an ingress replica caches, by the hash of the query. 0: no cache."""

    api_keys_file: str | None = None
    """YAML file of API keys and their scopes; the format is described in `serving/api_keys.py`. Null: the environment
    variable HTCL_API_KEYS, or no keys."""
    requests_per_second: float | None = Field(None, gt=0)
    """Sustained rate limit per key, or per address for clients without a key, in each ingress replica, in requests per
    second. Null: no limit."""
    request_burst: int = Field(20, ge=1)
    """Number of requests that may exceed the sustained rate at once."""
    max_waiting_requests: int = Field(32, ge=1)
    """Maximum number of requests in progress in an ingress replica that may need an encoder, counted from their
    arrival; excess requests are rejected with 429 (load shedding). A further quarter is accepted for requests that need
    no encoder, so that searches by song are possible while no encoder responds."""
    request_seconds: float = Field(30.0, gt=0)
    """Time limit in seconds for processing a request, from its complete arrival; 503 after it."""
    receive_seconds: float = Field(60.0, gt=0)
    """Time limit in seconds for receiving the body of a request; 408 after it."""
    allowed_origins: Names = ()
    """Origins of web pages that may call the service from a browser (CORS), such as `https://music.example`; none by
    default."""

    max_upload_bytes: int = Field(50_000_000, gt=0)
    """Maximum size of an uploaded file in bytes."""
    max_upload_seconds: float = Field(600.0, gt=0)
    """Maximum length in seconds that the header of an upload may declare. Only the first `audio.clip_seconds` are
    decoded and embedded, as for the songs of the catalogue."""
    max_channels: int = Field(8, ge=1)
    """Maximum number of channels of an upload."""
    max_sample_rate: int = Field(192_000, ge=1_000)
    """Maximum sample rate of an upload, in Hz."""
    decode_seconds: float = Field(20.0, gt=0)
    """Time limit in seconds (wall clock) for decoding an upload, and for waiting for a free decoding process."""
    decode_cpu_seconds: float = Field(2.0, gt=0)
    """Limit of CPU time in seconds for decoding an upload, many times the need of an ordinary recording."""
    decode_bytes: int = Field(2_000_000_000, ge=300_000_000)
    """Memory limit of a decoding process in bytes."""
    decoders: int = Field(2, ge=1)
    """Number of decoding processes per encoder replica."""

    play_audio: bool = True
    """Whether clients that may search can also play the songs. The service reads the audio files from the paths in the
    catalogue."""

    poll_seconds: float = Field(1.0, gt=0)
    """Interval in seconds at which an ingress replica checks for updates of songs and for a newly activated index."""
    activate_newest: bool = False
    """Whether to activate each newly built index of the same models automatically, unless its gate failed."""

    @property
    def most_in_progress(self) -> int:
        """The maximum number of requests in progress in an ingress replica, including those that need no encoder."""
        return self.max_waiting_requests + -(-self.max_waiting_requests // 4)

    @field_validator("trusted_proxies")
    @classmethod
    def _check_networks(cls, networks: tuple[str, ...]) -> tuple[str, ...]:
        for network in networks:
            try:
                ipaddress.ip_network(network)
            except ValueError:
                raise ValueError(
                    f"'{network}' is not an address or network; expected one such as 10.0.0.7 or 10.0.0.0/8"
                ) from None
        return networks

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_encoder_replicas is not None and self.max_encoder_replicas < self.encoder_replicas:
            raise ValueError(
                f"max_encoder_replicas is {self.max_encoder_replicas}; expected at least encoder_replicas "
                f"({self.encoder_replicas})"
            )
        return self
