"""Parts of `finetune_text_classifier.py`. None imports keras at import time but `training`."""
