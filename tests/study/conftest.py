import pytest

from megatron_mhc.study import pipeline


@pytest.fixture
def planned(monkeypatch):
    """Number of passes of each plan that a study makes, which is what its time goes into."""
    sizes = []
    make_plan = pipeline.make_plan

    def counted(schedule, ranks, microbatches, **more):
        plan = make_plan(schedule, ranks, microbatches, **more)
        sizes.append(ranks * microbatches)
        return plan

    monkeypatch.setattr(pipeline, 'make_plan', counted)
    pipeline._path.cache_clear()
    return sizes
