"""State of optimizers: how it is held, and the files of a native checkpoint.

A native checkpoint is a directory of safetensors shards and one JSON manifest. `manifest` says what it contains and
reads it strictly, `files` writes it (collectively, atomically), `reader` finds, verifies and reads it on any layout.
"""
