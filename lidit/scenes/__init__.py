"""The miniature world: drawn scenes, their captions, and an exact judge that reads the pixels back."""
