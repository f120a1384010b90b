"""What may go wrong with one shard while the others go on."""

from __future__ import annotations

import pyarrow as pa

from pipeline.job import JobError
from pipeline.results import OutputError
from pipeline.shards import ShardError
from pipeline.storage import StorageError

ShardFault = (ShardError, StorageError, OutputError, JobError, pa.ArrowException, OSError)
"""What concerns one shard only. Anything else that a task raises is a bug and ends the run."""
