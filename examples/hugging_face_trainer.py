"""NGD as the optimizer of Hugging Face's Trainer. Run: python examples/hugging_face_trainer.py"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from ngd_dist import NGD, NGDConfig

torch.manual_seed(0)
model = BertForSequenceClassification(
    BertConfig(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.1,
    )
)
labels = torch.randint(2, (1024,))
tokens = torch.randint(0, 70, (1024, 12)) + 30 * labels[:, None]  # the two classes share tokens 30 to 69
dataset = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]

optimizer = NGD(model, NGDConfig(lr=0.1, damping=0.3))
with tempfile.TemporaryDirectory() as folder:
    Trainer(
        model,
        TrainingArguments(
            folder,
            num_train_epochs=5,
            per_device_train_batch_size=128,
            logging_steps=8,
            max_grad_norm=0,  # clipped gradients no longer fit the statistics: set NGDConfig.clip instead
            lr_scheduler_type="linear",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=dataset,
        optimizers=(optimizer, None),  # None: Trainer builds the schedule named above
    ).train()
