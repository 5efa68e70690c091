"""The main job: fine-tune a classifier plainly and adversarially, and compare the two."""
