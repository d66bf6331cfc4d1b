"""Trained models at work: prediction, video, export."""

from .predictor import Predictor

__all__ = ["Predictor"]
