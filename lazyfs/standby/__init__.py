"""A resident process with everything imported, that forks ready-made commands (`docs/standby.md`).

    client      what a command does first: ask, and be its deputy's terminal; light imports only
    wire        what the two say to each other
    server      who listens, looks at who asks, and forks
    rights      what a process may do: a client must be allowed exactly what its standby is
    takeover    the child takes on what the client has: limits, control groups, descriptors
    deputy      the child, from its fork to its end
    cmdline     what `ps` shows of it
    preload     what is imported ahead

Privileges never grow: a child has what the standby has, and whoever has anything else, less or
more, is declined and carries on by himself.
"""
