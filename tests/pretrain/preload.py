"""What a forked rank needs: imported once."""

import transformers.models.bert.modeling_bert
import transformers.models.llama.modeling_llama  # noqa: F401
