"""The architectures: each has features(x) and a normalisation in front."""

from models.selector import Classifier, load_model, select_model

__all__ = ["Classifier", "load_model", "select_model"]
