// SPDX-License-Identifier: MIT OR Apache-2.0

//! The results of the tests and how long each took, for people and as JUnit XML.

use crate::context;
use anyhow::{Context as _, Result};
use harness::{Machine, Source};
use std::{
    fmt::Write as _,
    fs,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

struct Done {
    test: String,
    time: Duration,
    failure: Option<String>,
}

static DONE: Mutex<Vec<Done>> = Mutex::new(Vec::new());

fn done() -> MutexGuard<'static, Vec<Done>> {
    DONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The folder for output, if this runs in a checkout.
pub fn out() -> Option<PathBuf> {
    Some(PathBuf::from(std::env::var_os("VMGENID_TOP")?).join("out"))
}

/// Records the result of a test that has ended.
pub fn add(test: &str, time: Duration, result: &Result<()>) {
    done().push(Done {
        test: test.into(),
        time,
        failure: result.as_ref().err().map(|err| format!("{err:#}")),
    });
}

/// Prints which tests took longest, and writes all results to
/// out/junit-KERNEL[-PARAMETERS].xml.
pub fn report(ignored: &[String]) {
    let mut done = done();
    if done.is_empty() {
        return;
    }
    done.sort_by_key(|done| std::cmp::Reverse(done.time));
    eprintln!("the slowest tests:");
    for done in done.iter().take(10) {
        eprintln!("{:8.1} s  {}", done.time.as_secs_f64(), done.test);
    }
    let mut suite = harness::kernel::default();
    if let Some(parameters) = context::parameters() {
        suite += &format!("-{}", parameters.replace(['/', ' '], "_"));
    }
    if context::source() == Source::Vmclock {
        suite += "-vmclock";
    }
    if context::machine() == Machine::Microvm {
        suite += "-microvm";
    }
    let Some(path) = out().map(|out| out.join(format!("junit-{suite}.xml"))) else {
        return;
    };
    let written = fs::write(&path, junit(&suite, &done, ignored));
    if let Err(err) = written.with_context(|| format!("cannot write {}", path.display())) {
        eprintln!("suite: {err:#}");
    }
}

fn junit(suite: &str, done: &[Done], ignored: &[String]) -> String {
    let failed = done.iter().filter(|done| done.failure.is_some()).count();
    let mut xml = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<testsuite name=\"{}\" tests=\"{}\" failures=\"{failed}\" skipped=\"{}\">\n",
        escaped(suite),
        done.len() + ignored.len(),
        ignored.len()
    );
    let mut case = |test: &str, time: Duration, what: &str| {
        let (class, name) = test.rsplit_once("::").unwrap_or(("", test));
        let _ = writeln!(
            xml,
            "<testcase classname=\"{}\" name=\"{}\" time=\"{:.3}\">{what}</testcase>",
            escaped(class),
            escaped(name),
            time.as_secs_f64()
        );
    };
    for done in done {
        let failure = done.failure.as_deref().map(escaped);
        let failure = failure.map_or(String::new(), |text| format!("<failure>{text}</failure>"));
        case(&done.test, done.time, &failure);
    }
    for test in ignored {
        case(test, Duration::ZERO, "<skipped/>");
    }
    xml + "</testsuite>\n"
}

/// Escapes a text for XML, as an element's content or as an attribute. XML cannot express most
/// control characters, so each is replaced.
fn escaped(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\n' | '\t' => escaped.push(c),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expect that the XML has each test that ran, with its failure, and each ignored test, and
    /// that special and control characters are escaped.
    #[test]
    fn junit_has_each_test_and_is_sound_xml() {
        let done = |test: &str, failure: Option<&str>| Done {
            test: test.into(),
            time: Duration::from_millis(1500),
            failure: failure.map(String::from),
        };
        let all = [
            done("a::b::c", None),
            done("d", Some("1 < 2 & \"3\" ]]>\n\x1b[1mé\0")),
        ];
        assert_eq!(
            junit("tiny", &all, &["e::f".into()]),
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n\
            <testsuite name=\"tiny\" tests=\"3\" failures=\"1\" skipped=\"1\">\n\
            <testcase classname=\"a::b\" name=\"c\" time=\"1.500\"></testcase>\n\
            <testcase classname=\"\" name=\"d\" time=\"1.500\"><failure>\
            1 &lt; 2 &amp; &quot;3&quot; ]]&gt;\n\u{fffd}[1mé\u{fffd}</failure></testcase>\n\
            <testcase classname=\"e\" name=\"f\" time=\"0.000\"><skipped/></testcase>\n\
            </testsuite>\n"
        );
    }
}
