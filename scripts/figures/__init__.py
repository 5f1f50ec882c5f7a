"""The paper's analyses of a run, as pictures."""
