"""The HTTP application: where it listens, who may call, how it encodes, and what it refuses."""

from __future__ import annotations

import ipaddress
from typing import Self

from pydantic import Field, field_validator, model_validator

from htcl_ray.config.sections.base import Names, Settings


class ServeSettings(Settings):
    """The HTTP application."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    allowed_hosts: Names = ()
    """Names that a request's Host header may carry, in addition to localhost and serve.host; `*` allows any, for a
    proxy that checks. Where other machines reach serve.host, addresses (such as 192.0.2.7) are allowed as well."""
    trusted_proxies: Names = ()
    """Addresses or networks (such as 10.0.0.0/8) of proxies whose X-Forwarded-For header is believed; none. Rate limits
    of callers without a key count the address that it names, and otherwise the address of the connection."""
    metrics_host: str = "127.0.0.1"
    """Address of `/metrics` for Prometheus, which needs no key: keep it to machines that may read it."""
    metrics_port: int | None = Field(None, ge=0, le=65535)
    """Port of `/metrics`. Null: 9464, or a free one where that is taken; 0: a free one. Both are printed at the
    start."""

    encoder_replicas: int = Field(1, ge=1)
    """Encoder replicas, and the fewest when they scale."""
    max_encoder_replicas: int | None = Field(None, ge=1)
    """The most; replicas then scale with the requests under way. Null: always `encoder_replicas`."""
    encoder_cpus: float = Field(1.0, gt=0)
    """CPUs that an encoder replica reserves; it computes with max(1, this) threads."""
    encoder_gpus: float = Field(0.0, ge=0)
    """Share of a GPU that an encoder replica reserves; 0 computes on the CPU."""
    ingress_replicas: int = Field(1, ge=1)
    """Replicas that hold the index and answer HTTP; those on one machine share its pages."""
    max_batch_size: int = Field(16, ge=1)
    """Audio clips or texts that one encoder call takes together."""
    batch_wait_seconds: float = Field(0.01, ge=0)
    """How long the first request of a batch waits for others."""
    cache_entries: int = Field(10_000, ge=0)
    """Queries, by the hash of their content, whose vectors an ingress replica remembers; 0 none."""

    api_keys_file: str | None = None
    """YAML file of the keys that may call; see `serving/api_keys.py`. Null: HTCL_API_KEYS, or none."""
    requests_per_second: float | None = Field(None, gt=0)
    """Lasting rate of one key, or of one address without keys, at each ingress replica; null is no limit."""
    request_burst: int = Field(20, ge=1)
    """Requests beyond the lasting rate that may come at once."""
    max_waiting_requests: int = Field(32, ge=1)
    """Requests in progress in an ingress replica that may need an encoder, counted once they have arrived; further ones are rejected with
    429. A quarter more are taken of those that need none, so that searches by song are answered also while no encoder responds."""
    request_seconds: float = Field(30.0, gt=0)
    """Time in which a request has to be answered once it has arrived; after it the response is 503."""
    receive_seconds: float = Field(60.0, gt=0)
    """Time in which the body of a request has to arrive; after it the response is 408."""
    allowed_origins: Names = ()
    """Origins of web pages that may call from a browser (CORS); none."""

    max_upload_bytes: int = Field(50_000_000, gt=0)
    max_upload_seconds: float = Field(600.0, gt=0)
    """Length that the header of an upload may declare. Whatever its length, the first audio.clip_seconds are embedded,
    as those of the catalogue's songs are, and nothing behind them is decoded."""
    max_channels: int = Field(8, ge=1)
    max_sample_rate: int = Field(192_000, ge=1_000)
    decode_seconds: float = Field(20.0, gt=0)
    """Wall-clock time: decoding an upload that takes longer is ended, and so is waiting for a free decoding process."""
    decode_cpu_seconds: float = Field(2.0, gt=0)
    """CPU time that decoding an upload may take, many times that of an ordinary recording; more is refused."""
    decode_bytes: int = Field(2_000_000_000, ge=300_000_000)
    """Memory of a decoding process."""
    decoders: int = Field(2, ge=1)
    """Decoding processes of an encoder replica."""

    play_audio: bool = True
    """Let those who may search hear the songs: the files that the catalogue names, read from where they lie."""

    poll_seconds: float = Field(1.0, gt=0)
    """How often an ingress replica looks for updates of songs and for another active index."""
    activate_newest: bool = False
    """Activate each newly built index of the same models whose gate did not fail."""

    @property
    def most_in_progress(self) -> int:
        """Requests in progress in an ingress replica, with those that need no encoder."""
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
                f"max_encoder_replicas is {self.max_encoder_replicas}; expected at least encoder_replicas ({self.encoder_replicas})"
            )
        return self
