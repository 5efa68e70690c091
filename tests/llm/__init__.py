"""The losses of LLM safety, against full logits in float64, recorded runs and closed forms."""
