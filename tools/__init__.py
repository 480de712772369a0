"""What is done with a trained model: judging it, exchanging it."""
