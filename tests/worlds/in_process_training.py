"""Training in the process of the test, for tests whose subject is what is trained and not how Ray Train runs it.

Ray Train starts about eight processes for a run and imports PyTorch in three of them, which takes longer than the steps
of a small model. Its local mode, a scaling configuration without workers, calls the same training function in this
process. Batches do not depend on the number of workers: tests/distributed/test_gradients.py. Resuming and failures of
real runs: tests/ray/test_train.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def training_in_process() -> Iterator[None]:
    """Use Ray Train's local mode until the block ends; its checkpoints are removed then."""
    import ray.train

    from htcl_ray.pipelines import train_worker

    scaling_config = ray.train.ScalingConfig
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray.train, "ScalingConfig", lambda **settings: scaling_config(num_workers=0))
        patch.setattr(train_worker, "private_folder", lambda: Path(folder))
        # Ray Train leaves its local mode switched on in this process.
        patch.setattr("ray.train.v2._internal.execution.train_fn_utils._train_fn_utils", None)
        yield
