"""Checkpoints in the layouts of transformers and of original code, read into classes of
`transformers`.
"""
