"""The methods circuit probing is compared with: classifiers, control tasks, erasure, counterfactuals, interchange."""

from probing._beside import (
    Eraser,
    VectorProbe,
    control_labels,
    counterfactual_vectors,
    selectivity,
    train_vector_probe,
)
from probing._patch import Interchange, interchange_accuracy, patched, train_interchange

__all__ = [
    "VectorProbe",
    "train_vector_probe",
    "control_labels",
    "selectivity",
    "Eraser",
    "counterfactual_vectors",
    "patched",
    "Interchange",
    "train_interchange",
    "interchange_accuracy",
]
