"""Prediction with trained models.

`Predictor` loads a model (loading) and runs its network (runtimes). `predict_files` (batch) reads
inputs, writes outputs and resumes after interruptions; live is for cameras, ray for clusters, and
web for a browser.
"""

from imrcnn_d2.deploy.batch import Summary, predict_files
from imrcnn_d2.deploy.loading import load_model
from imrcnn_d2.deploy.predictor import Predictor
from imrcnn_d2.engine.checkpoint import pretrained

__all__ = ["Predictor", "Summary", "load_model", "predict_files", "pretrained"]
