"""What several sweeps over the objectives build once."""

import pytest
from contracts import cases


@pytest.fixture(scope="module")
def made():
    """name -> (model, objective, readers, samples): built once per objective and never changed."""
    built = {}

    def make(name):
        if name not in built:
            model = cases.model()
            objective = cases.objective(name, model)
            readers = cases.readers(model, objective)
            built[name] = model, objective, readers, cases.examples(readers)
        return built[name]

    return make
