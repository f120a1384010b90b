"""Planning a corpus as tasks: what a task that fails means for the run. Whole passes are in test_corpus_run.py."""

import pytest
import ray

from pipeline.corpus import corpus_planner
from pipeline.job import JobError
from pipeline.shards import ShardError

DAMAGED = ShardError("the sorted run 3 is damaged")


@pytest.mark.parametrize("cause, raised", [(DAMAGED, JobError), (KeyError("a"), None)])
def test_a_damaged_sorted_run_ends_planning_with_a_message_and_a_bug_with_its_traceback(cause, raised, monkeypatch):
    def fail(_ref):
        raise ray.exceptions.RayTaskError("merge_range_task", "Traceback ...", cause)

    monkeypatch.setattr(ray, "get", fail)
    with pytest.raises(raised or ray.exceptions.RayTaskError) as error:
        corpus_planner._result_of(None)
    if raised is not None:
        assert "the sorted run 3 is damaged; run the same command again" in str(error.value)
