"""The names of the files that jobs leave in their folders."""

ALL, ACCEPTED, REJECTED = "particles.star", "particles_accepted.star", "particles_rejected.star"
"""The particles with scores and the two subsets, of `score` and `select`."""

SCORES_CSV, FEATURES, BAD_IMAGES = "scores.csv", "features.npy", "bad_images.csv"
"""Of `score`."""

MODEL, HISTORY, CHECKPOINT = "model.safetensors", "history.csv", "checkpoint_last.pt"
"""Of `train`."""

METRICS, PREDICTIONS = "metrics.json", "predictions.csv"
"""Of `train` and `metrics`."""

LOGFILE, REPORT = "logfile.pdf", "report.html"
"""The report, for RELION's Display menu and for a browser."""
