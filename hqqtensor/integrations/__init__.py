"""What makes hqqtensor at home in other libraries. Nothing here imports one of them before the user does."""
