"""The scores of a run: the held-out questions, the settings that are asked, and the table of results."""
