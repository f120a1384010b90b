"""`shoal schema`: the JSON Schema of the job file, for editors and for whoever writes job files by program."""

from __future__ import annotations

import json

from pipeline.job import job_schema


def schema() -> int:
    """Print the schema to standard output."""
    print(json.dumps(job_schema(), indent=2))
    return 0
