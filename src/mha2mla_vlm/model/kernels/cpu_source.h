// Where the CPU kernel reads tokens: numbers, and before them some in 8, 4 or 2 bits with a range for each
// channel and block of tokens (model/cache/quantization.py is the specification of the format).

#pragma once

#include "cpu_product.h"

extern "C" {

struct Source {  // [B, heads, S, width]: first the tokens in codes, then those in numbers
  const bf16* numbers;
  long batch, head, token;        // numbers from one to the next
  const uint8_t* codes;           // bytes [B, heads, blocks, block, width * bits / 8], dense but for the batch
  const uint16_t *low, *step;     // float16 [B, heads, blocks, width], dense but for the batch
  long coded, code_batch, code_head, code_token, range_batch, range_head;
  int bits, block;  // block is a multiple of the tile
  const int32_t* pages;  // [B, pages], or null; `batch` is then from page to page
  long pages_row, page;  // tokens of a page, a multiple of the tile
};
}

namespace {

struct Span {
  const char* at;
  long bytes, distance;  // to the same tokens of the next head
};

// Where the numbers of a token lie; tokens that follow in the same tile follow there.
const bf16* numbers_of(const Source& s, int b, int head, long token) {
  const long place = s.pages ? s.pages[b * s.pages_row + token / s.page] : b;
  const long at = s.pages ? token % s.page : token - s.coded;
  return s.numbers + place * s.batch + head * s.head + at * s.token;
}

// Where some tokens of the first head lie, of which all or none are in codes.
Span span_of(const Source& s, int b, long token, long count) {
  if (token < s.coded)
    return {(const char*)s.codes + b * s.code_batch + token * s.code_token, count * s.code_token, s.code_head};
  return {(const char*)numbers_of(s, b, 0, token), count * s.token * 2, s.head * 2};
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

// The numbers of a tile of tokens of one head, all or none of which are in codes, in whole pairs: those in codes
// or of odd width come to `room`.
Rows rows_of(const Source& s, int b, int head, long token, int count, int width, bf16* room) {
  const long row = up_to(width, 32);
  for (int t = 0; width % 2 && t < count; ++t) room[t * row + width] = 0;
  if (token >= s.coded) {
    const bf16* at = numbers_of(s, b, head, token);
    if (width % 2 == 0 && s.token % 2 == 0) return {at, s.token};
    for (int t = 0; t < count; ++t) std::memcpy(room + t * row, at + t * s.token, width * 2);
    return {room, row};
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
  return {room, row};
}

}  // namespace
