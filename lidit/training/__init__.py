"""What training needs besides the model.

optimizers.py: AdamW, and Muon for hidden matrices    train_loss.py: logs the loss of all ranks since the last log
"""
