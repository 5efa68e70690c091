"""One adversarial step of one model: `Engine` lives with the model, a `Step` with one `backward`."""
