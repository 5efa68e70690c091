"""Pretrain language models adversarially: `fastadv pretrain`."""
