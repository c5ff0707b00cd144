//! The shipped unit, `docs/slb.service`, under a real systemd.

#[cfg(test)]
mod lifecycle;
#[cfg(test)]
mod privileges;
#[cfg(test)]
mod site;
