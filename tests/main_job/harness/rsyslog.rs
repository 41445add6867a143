//! rsyslog, as a server.

use std::process::{Child, Stdio};

use super::machine::{self, Need, RSYSLOG, RSYSLOG_TLS, ReservedPort};
use super::site::Site;

/// What [`Rsyslog`] needs.
pub(crate) const NEEDS: [Need; 2] = [RSYSLOG, RSYSLOG_TLS];

/// An rsyslog that receives over TLS only.
pub(crate) struct Rsyslog(Child);

impl Rsyslog {
    /// Starts rsyslog in a site's directory; it appends the messages to `received`.
    pub(crate) fn start(site: &Site, port: &ReservedPort) -> Self {
        let port = port.number();
        let directory = site.path("").display().to_string();
        let configuration = format!(
            r#"
            global(workDirectory="{directory}" maxMessageSize="64k" net.enableDNS="off"
                   defaultNetstreamDriverCAFile="{directory}/ca.pem"
                   defaultNetstreamDriverCertFile="{directory}/cert.pem"
                   defaultNetstreamDriverKeyFile="{directory}/key.pem")
            module(load="imtcp" maxSessions="1000")
            input(type="imtcp" address="127.0.0.1" port="{port}" streamDriver.name="gtls" streamDriver.mode="1"
                  streamDriver.authMode="anon")
            template(name="line" type="string" string="%msg%\n")
            action(type="omfile" file="{directory}/received" template="line")
            "#
        );
        site.write("rsyslog.conf", configuration);
        let mut command = machine::command("rsyslogd");
        command
            .args(["-n", "-C", "-f"])
            .arg(site.path("rsyslog.conf"))
            .arg("-i")
            .arg(site.path("rsyslog.pid"));
        // It reports every connection that a kill ended.
        Self(command.stdin(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Rsyslog {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
