// Where the CPU kernel reads tokens: numbers, and before them some in 8, 4 or 2 bits with a range for each
// channel and block of tokens (model/cache/quantization.py is the specification of the format), or rows of bytes
// whose channels differ in bits (model/cache/packed.py is).

#pragma once

#include "cpu_product.h"

extern "C" {

enum Form { NUMBERS, BY_CHANNEL, INTEGERS };  // bfloat16; bytes of a row's `channels`; int8

struct Source {  // [B, heads, S, width]: first the tokens in codes, then those that are stored
  const char* stored;
  long batch, head, token;        // bytes from one to the next
  const uint8_t* codes;           // bytes [B, heads, blocks, block, width * bits / 8], dense but for the batch
  const uint16_t *low, *step;     // float16 [B, heads, blocks, width], dense but for the batch
  long coded, code_batch, code_head, code_token, range_batch, range_head;
  int bits, block;  // block is a multiple of the tile
  const int32_t* pages;  // [B, pages], or null; `batch` is then from page to page
  long pages_row, page;  // tokens of a page, a multiple of the tile
  int form, channels[4];  // how many channels of a row have 16, 8, 4 and 2 bits
};
}

namespace {

struct Span {
  const char* at;
  long bytes, distance;  // to the same tokens of the next head
};

// Where a token is stored; tokens that follow in the same tile follow there.
const char* place_of(const Source& s, int b, int head, long token) {
  const long place = s.pages ? s.pages[b * s.pages_row + token / s.page] : b;
  const long at = s.pages ? token % s.page : token - s.coded;
  return s.stored + place * s.batch + head * s.head + at * s.token;
}

// Where some tokens of the first head lie, of which all or none are in codes.
Span span_of(const Source& s, int b, long token, long count) {
  if (token < s.coded)
    return {(const char*)s.codes + b * s.code_batch + token * s.code_token, count * s.code_token, s.code_head};
  return {place_of(s, b, 0, token), count * s.token, s.head};
}

// 32 channels of `count` tokens, whose codes are `shift` bits up in bytes from `codes` on, as low + code * step
void decode_channels(const Source& s, const uint8_t* codes, int shift, const uint16_t* low, const uint16_t* step,
                     int count, int channels, bf16* to, long row) {
  const __mmask32 some = channels >= 32 ? ~0u : (1u << channels) - 1;
  const auto half = [&](const uint16_t* from, int at) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16(some >> at), from + at));
  };
  const __m512 low_a = half(low, 0), low_b = half(low, 16), step_a = half(step, 0), step_b = half(step, 16);
  const __m256i kept = _mm256_set1_epi8(char((1 << s.bits) - 1));
  for (int t = 0; t < count; ++t) {
    const __m256i bytes = _mm256_maskz_loadu_epi8(some, codes + t * s.code_token);
    const __m256i code = _mm256_and_si256(_mm256_srli_epi16(bytes, shift), kept);
    const __m512 a = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(code)));
    const __m512 b = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(code, 1)));
    const __m512bh both = _mm512_cvtne2ps_pbh(_mm512_fmadd_ps(b, step_b, low_b), _mm512_fmadd_ps(a, step_a, low_a));
    _mm512_mask_storeu_epi16(to + t * row, some, (__m512i)both);
  }
}

// 32 numbers from the bytes of up to so many
__m512i as_pairs(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }

__m512i from_halves(const char* at, int count) {
  const __m512i halves = load((const bf16*)at, count);
  return as_pairs(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)));
}

__m256i load_bytes(const char* at, int count) {
  return count >= 32 ? _mm256_loadu_si256((const __m256i*)at) : _mm256_maskz_loadu_epi8((1u << count) - 1, at);
}

__m512i from_integers(const char* at, int count) {
  const __m256i bytes = load_bytes(at, count);
  return as_pairs(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(bytes))),
                  _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(bytes, 1))));
}

__m512i from_bytes(const char* at, int count) {
  const __m256i bytes = load_bytes(at, count);
  const __m512 middle = _mm512_set1_ps(127.5f);
  const __m512 first = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_castsi256_si128(bytes)));
  const __m512 second = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm256_extracti128_si256(bytes, 1)));
  return as_pairs(_mm512_sub_ps(first, middle), _mm512_sub_ps(second, middle));
}

// What codes of 4 or 2 bits stand for, exact in bfloat16
__m512i value_table(int bits) {
  alignas(64) bf16 values[32] = {};
  for (int code = 0; code < 1 << bits; ++code) {
    const float value = float(code) - float((1 << bits) - 1) / 2;
    std::memcpy(values + code, (const char*)&value + 2, 2);
  }
  return _mm512_load_si512(values);
}

__m512i from_codes(const char* at, int count, int bits, int shift, __m512i table) {
  const __m512i words = _mm512_srli_epi16(_mm512_cvtepu8_epi16(load_bytes(at, count)), shift);
  return _mm512_permutexvar_epi16(_mm512_and_si512(words, _mm512_set1_epi16((1 << bits) - 1)), table);
}

// A token's numbers; what is behind them up to 31 numbers on is written, too, and comes after.
template <typename Make>
void unpack_some(const char*& from, bf16*& to, int count, int size, Make make) {
  for (int at = 0; at < count; at += 32) _mm512_storeu_si512(to + at, make(from + at * size, count - at));
  from += count * size, to += count;
}

// The tokens from `from` on.
void unpack_rows(const Source& s, const char* from, int count, int width, bf16* to, long row) {
  const __m512i fours = value_table(4), twos = value_table(2);
  for (int t = 0; t < count; ++t) {
    const char* at = from + t * s.token;
    bf16* out = to + t * row;
    if (s.form == INTEGERS) {
      unpack_some(at, out, width, 1, from_integers);
      continue;
    }
    unpack_some(at, out, s.channels[0], 2, from_halves);
    unpack_some(at, out, s.channels[1], 1, from_bytes);
    for (int bits = 4, number = 2; bits >= 2; bits /= 2, ++number) {
      const __m512i table = bits == 4 ? fours : twos;
      const char* codes = at;
      for (int shift = 0; shift < 8; shift += bits) {  // a byte holds channels from equal parts of them
        at = codes;
        unpack_some(at, out, s.channels[number] * bits / 8, 1,
                    [&](const char* x, int some) { return from_codes(x, some, bits, shift, table); });
      }
    }
  }
}

// The numbers of a tile of tokens of one head, all or none of which are in codes, in whole pairs: those in codes,
// in bytes or of odd width come to `room`.
Rows rows_of(const Source& s, int b, int head, long token, int count, int width, bf16* room) {
  const long row = up_to(width, 32);
  const auto whole = [&] {
    for (int t = 0; width % 2 && t < count; ++t) room[t * row + width] = 0;
    return Rows{room, row};
  };
  if (token >= s.coded) {
    const char* at = place_of(s, b, head, token);
    if (s.form == NUMBERS && width % 2 == 0 && s.token % 4 == 0) return {(const bf16*)at, s.token / 2};
    if (s.form == NUMBERS)
      for (int t = 0; t < count; ++t) std::memcpy(room + t * row, at + t * s.token, width * 2);
    else
      unpack_rows(s, at, count, width, room, row);
    return whole();
  }
  const long range = b * s.range_batch + head * s.range_head + token / s.block * width;
  const uint8_t* codes = s.codes + b * s.code_batch + head * s.code_head + token * s.code_token;
  for (int part = 0; part < 8 / s.bits; ++part)  // a byte holds channels from equal parts of the width
    for (int at = 0; at < s.code_token; at += 32) {
      const int channel = part * int(s.code_token) + at;
      const int channels = std::min({32, int(s.code_token) - at, width - channel});
      if (channels > 0)
        decode_channels(s, codes + at, part * s.bits, s.low + range + channel, s.step + range + channel, count,
                        channels, room + channel, row);
    }
  return whole();
}

}  // namespace
