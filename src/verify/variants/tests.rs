use super::*;

#[test]
fn the_tokens_make_up_the_line() {
    for line in [
        r#"{"a":1,"b\"":[-1.5e+3, true,null],"ü":"\\"}"#,
        "{\"a",
        "{\"a\\",
        "{\"ü\\ü",
        "ü {",
        "",
        "{\"a\":\u{1}}",
    ] {
        assert_eq!(tokens(line).iter().map(Token::as_str).collect::<String>(), line);
    }
    assert_eq!(tokens("{\"a\": -1}")[3..5], [Token::Space(" "), Token::Number("-1")]);
}

#[test]
fn the_original_is_among_the_variants() {
    for (now, before) in [
        (r#"{"a": 1, "b": "x"}"#, r#"{"a":1,"b":"x"}"#),
        (r#"{"a":"x\/y"}"#, r#"{"a":"x/y"}"#),
        (r#"{"a":"x/y"}"#, r#"{"a":"x\/y"}"#),
        (r#"{"a":"\u00fc\ud83d\ude00\u0007"}"#, "{\"a\":\"ü😀\\u0007\"}"),
        ("{\"a\":\"ü😀\"}", r#"{"a":"\u00fc\ud83d\ude00"}"#),
        (r#"{"a":"<&>"}"#, r#"{"a":"\u003c\u0026\u003e"}"#),
        (r#"{"a":1000.0,"b":20.0,"c":5}"#, r#"{"a":1e3,"b":20,"c":5}"#),
        (r#"{"a":1000,"b":5}"#, r#"{"a":1e3,"b":5}"#),
        (r#"{"a":1500.0}"#, r#"{"a":1.5e3}"#),
        (r#"{"a": "x/y", "b": 1000.0}"#, r#"{"a":"x\/y","b":1e3}"#),
    ] {
        let all: Vec<_> = reserialised(now).collect();
        let found = all.iter().find(|variant| variant.line == before.as_bytes());
        assert!(found.is_some_and(|found| !found.what.is_empty()), "{now}");
        let lines: HashSet<_> = all.iter().map(|variant| &variant.line).collect();
        assert_eq!(lines.len(), all.len());
    }
    assert_eq!(reserialised("no json").count(), 1);
}

#[test]
fn the_neighbours_of_a_float_are_the_integers_that_round_to_it() {
    assert_eq!(neighbours(EXACT).collect::<Vec<_>>(), [1 << 53, (1 << 53) + 1]);
    let all: Vec<u128> = neighbours(1_146_381_705_542_353_508_u64 as f64).collect();
    assert!(all.contains(&1_146_381_705_542_353_508));
    assert!((127..=129).contains(&all.len()), "{}", all.len());
    assert!(neighbours(u64::MAX as f64).count() <= 3_100);
    let line = variant(r#"{"rt":1,"trace_id":"1146381705542353500","x":1.1463817055423535e18}"#, "");
    for before in [
        r#"{"rt":1,"trace_id":"1146381705542353508","x":1.1463817055423535e18}"#,
        r#"{"rt":1,"trace_id":"1146381705542353500","x":1146381705542353508}"#,
    ] {
        assert!(rounded(&line).any(|found| found.line == before.as_bytes()), "{before}");
    }
}

#[test]
fn the_first_variants_of_a_long_line_need_little_memory() {
    let ids: Vec<String> = (0..10_000_u64).map(|n| ((1 << 60) + n * 1000).to_string()).collect();
    let ids = format!("{{\"a\":[{}]}}", ids.join(","));
    let floats: Vec<String> = (0..30_000).map(|n| format!("\"n{n}\":1e{}", n % 15)).collect();
    let floats = format!("{{{}}}", floats.join(","));
    for line in [ids, floats] {
        // All variants at once would not fit into memory.
        let first = |all: Variants<'_>| all.take(100).map(|one| one.line.len()).sum::<usize>();
        assert!(first(wrapped(line.as_bytes())) > 0);
        assert!(first(reserialised(&line)) >= 2 * line.len());
        let _ = first(rounded(&variant(line.clone(), "")));
        let numbers = numbers(&tokens(&line));
        assert!(numbers.len() <= MOST_NUMBERS, "{}", numbers.len());
    }
}
