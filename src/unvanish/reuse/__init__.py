"""What is already learnt is kept: foreign weights, frozen layers, cached features, pretraining layer by layer."""
