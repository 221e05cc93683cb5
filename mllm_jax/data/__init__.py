"""From bytes on disk to batches: numpy, Pillow and Grain only; no device array is ever made here."""
