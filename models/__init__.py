"""The architectures: each has features(x) and a normalisation in front."""

from models.selector import Classifier, recognise, select_model

__all__ = ["Classifier", "recognise", "select_model"]
