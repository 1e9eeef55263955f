"""What people look at: thresholds by request, metrics with intervals, figures."""
