"""How servers behaved, as far as it decides which are used: values only, no sockets and no clock."""
