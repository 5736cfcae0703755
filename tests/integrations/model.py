"""What declearn's optimizer steps on."""


class Model:
    """As much of a model as declearn's optimizer asks for."""

    def __init__(self, weights):
        self.weights = weights

    def get_weights(self, trainable):
        return self.weights

    def apply_updates(self, updates):
        self.weights = self.weights + updates
