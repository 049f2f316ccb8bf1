"""Lightning callbacks, for ``lightning.pytorch`` and ``pytorch_lightning`` alike."""
