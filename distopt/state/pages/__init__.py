"""States that lie outside of the device: pages in host memory or in a file, and their way to the device and back."""
