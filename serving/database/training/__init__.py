"""What adapters are trained on: data sets, the pictures behind each adapter, consent taken back."""
