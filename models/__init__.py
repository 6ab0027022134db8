"""The architectures: each has features(x) and a normalisation in front."""

from models.selector import Classifier, select_model

__all__ = ["Classifier", "select_model"]
