"""Trained models at work: prediction, video, export."""

from imrcnn_d2.deploy.predictor import Predictor

__all__ = ["Predictor"]
