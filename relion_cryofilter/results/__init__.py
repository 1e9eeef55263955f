"""What people look at: files of results, charts, reports."""
