"""The four models: actor, critic, reward model, reference."""
