"""The command line: arguments in, exit codes out, and what a person sees in between.

A command's module is imported when the command is run. Within it, trio, protobuf and rich are
imported by what uses them, so that help, completion and a short answer are quick.
"""
