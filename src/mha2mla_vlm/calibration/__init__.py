"""What chats show about the layers of an original model, one layer at a time."""
