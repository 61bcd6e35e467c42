"""Evaluation of loaded models on loaded data, on one process: every number with its protocol, ready for JSON."""

from latticode.evaluate.classifier import evaluate_classifier
from latticode.evaluate.dense import evaluate_dense
from latticode.evaluate.prior import Reference, evaluate_prior
from latticode.evaluate.tokenizer import evaluate_tokenizer

__all__ = ["Reference", "evaluate_classifier", "evaluate_dense", "evaluate_prior", "evaluate_tokenizer"]
