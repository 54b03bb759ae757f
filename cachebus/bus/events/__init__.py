"""Events: who emits them and who subscribes to them."""
