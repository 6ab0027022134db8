"""The architectures, and loading them with the weights of a checkpoint."""

from models.loading import load_classifier, load_clean_model, load_model
from models.selector import Classifier, select_model

__all__ = ["Classifier", "load_classifier", "load_clean_model", "load_model", "select_model"]
