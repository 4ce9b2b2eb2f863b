//! Text to ids and back; chat templates.
