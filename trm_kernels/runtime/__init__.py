"""What every op stands on: the backend's choice, launches, their settings, dtypes."""
