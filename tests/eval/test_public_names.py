"""The metrics are there under the field's names, and importing them loads no plotting and no data set code."""

import subprocess
import sys

import numpy as np

import qdiff_jax.eval as evaluation


def test_names_are_functions_even_where_a_module_has_the_same():
    for name in evaluation.__all__:
        assert getattr(evaluation, name) is not None
    mu, cov = np.zeros(2), np.eye(2)
    assert evaluation.frechet_distance(mu, cov, mu + 1, cov) == 2.0
    assert callable(evaluation.inception_score)
    assert callable(evaluation.precision_recall)
    assert callable(evaluation.clip_score)
    assert callable(evaluation.lpips)


def test_the_import_is_light():
    heavy = {"matplotlib", "tensorflow_datasets", "PIL", "tensorflow", "torch", "optax", "orbax"}
    code = f"import sys, qdiff_jax.eval; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
